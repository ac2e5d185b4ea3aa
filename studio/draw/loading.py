"""A model that is loaded while the pages are there already."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from aesthetic.errors import DiskFull, UserError
from studio.errors import NotHere

if TYPE_CHECKING:
    from studio.draw.service import GenerationService


class LoadingModel:
    """Loads a model in a thread of its own; until it is there, whoever asks for it is told to wait.

    Args:
        load: loads it.
        log: called with what went wrong.
        on_fault: called with exceptions that are nobody's fault but ours.
    """

    def __init__(
        self,
        load: Callable[[], GenerationService],
        *,
        log: Callable[[str], None] = lambda line: None,
        on_fault: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._load, self._log, self._on_fault = load, log, on_fault
        self._lock = threading.Lock()
        self._service: GenerationService | None = None
        self._error = ""
        self._ended = False

    @property
    def service(self) -> GenerationService:
        """What draws. Raises NotHere until the model is loaded."""
        if self._service is not None:
            return self._service
        if self._error:
            raise NotHere(self._error, "start the studio again once that is mended")
        raise NotHere("the model is being loaded", "this takes from seconds to minutes, by its size")

    def start(self) -> None:
        """Begin to load."""
        threading.Thread(target=self._run, daemon=True, name="model").start()

    def stop(self) -> None:
        """Draw nothing more; does not wait."""
        with self._lock:
            self._ended = True
        if self._service is not None:
            self._service.queue.stop()

    def close(self) -> None:
        """Stop, and wait a second for the step that runs."""
        self.stop()
        if self._service is not None:
            self._service.close()

    def _run(self) -> None:
        try:
            service = self._load()
        except Exception as e:  # the other pages live on
            self._error = f"the model can't be loaded: {e}"
            self._log(self._error)
            if not isinstance(e, UserError | DiskFull):
                self._on_fault(e)
            return
        with self._lock:
            if not self._ended:
                service.start()
                self._service = service
