"""Which object store a URL means: its client, made from the usual environment; and what its errors mean."""

from __future__ import annotations

import configparser
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError

_SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az", "abfs": "az",
            "abfss": "az"}  # fmt: skip
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for a profile of ~/.aws, or run where a "
    "role is attached",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, run `gcloud auth application-default login`, or run where "
    "a service account is attached",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or run where a "
    "managed identity is attached",
}
_METADATA = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
"""Where machines of clouds are asked for the credentials of their role: asked last, so nothing else was there."""


class StoreUnavailable(Exception):
    """An object store fails or cannot be reached, also after all tries (exit code 1)."""


@dataclass(frozen=True)
class StoreURL:
    """A URL of an object store, taken apart."""

    kind: str  # s3, gs or az
    bucket: str  # az: the container
    prefix: str  # without slashes at its ends; may be empty
    account: str | None = None  # az, where the URL names it

    @property
    def url(self) -> str:
        if self.account:
            return f"abfss://{self.bucket}@{self.account}/{self.prefix}".rstrip("/")
        return f"{self.kind}://{self.bucket}/{self.prefix}".rstrip("/")


def is_url(text: str) -> bool:
    """Whether a text names a place on an object store: s3://, gs://, az:// and their other names."""
    scheme, found, _ = text.partition("://")
    return bool(found) and scheme.lower() in _SCHEMES


def parse_url(text: str) -> StoreURL:
    """Take a URL apart. Raises UserError where it is none of an object store, or names no bucket."""
    scheme, _, rest = text.partition("://")
    if not is_url(text):
        raise UserError(f"{_shown(text)}: not the URL of an object store: s3://bucket/folder, gs://... or az://...")
    bucket, _, prefix = rest.partition("/")
    kind, account = _SCHEMES[scheme.lower()], None
    if kind == "az" and "@" in bucket:
        bucket, account = bucket.split("@", 1)
    if not bucket:
        raise UserError(f"{text}: names no bucket: {kind}://bucket/folder is expected")
    if not re.fullmatch(r"[A-Za-z0-9$][A-Za-z0-9._-]{1,221}", bucket) or (account and not _is_host(account)):
        hint = " (credentials belong into the environment)" if "@" in rest or ":" in rest else ""
        raise UserError(f"{_shown(text)}: no bucket has such a name{hint}")
    prefix = prefix.strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise UserError(f"{text}: folders named '', '.' or '..' cannot be on an object store")
    if "?" in prefix or "#" in prefix or any(ord(c) < 32 for c in prefix):
        raise UserError(f"{_shown(text)}: a folder's name must not have ?, # or control characters in it")
    return StoreURL(kind, bucket, prefix, account)


def _is_host(text: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text) is not None


def _shown(text: str) -> str:
    """A URL as it may be printed: without what may be a password or a signature."""
    return re.sub(r"\?.*", "?...", re.sub(r"//[^/]*@", "//...@", text))


def make_client(place: StoreURL, patience: float) -> Any:
    """The client of a place, as its environment says.

    `patience`: seconds that failing requests are tried again for, with backoff, from the first one on.
    Raises UserError where the environment lacks something, or has what cannot be.
    """
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore, S3Store

    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(10.0, patience)),
        # a body of gigabytes over a slow line takes its time; what must not stall is each read of it
        "timeout": timedelta(hours=6) if patience >= 60 else timedelta(seconds=max(1.0, patience)),
        "read_timeout": timedelta(seconds=max(1.0, min(60.0, patience / 2))),
        "pool_max_idle_per_host": "64",
    }
    settings: dict[str, Any] = {
        "prefix": place.prefix or None,
        "client_options": options,
        "retry_config": _retries(patience),
    }
    try:
        if place.kind == "s3":
            config, provider = _s3_config()
            if config.get("endpoint", "").startswith("http://"):
                options["allow_http"] = True
            if bundle := os.environ.get("AWS_CA_BUNDLE"):
                options["root_certificate"] = Path(bundle).read_bytes()
            return S3Store(place.bucket, config=config, credential_provider=provider, **settings)
        if place.kind == "gs":
            return GCSStore(place.bucket, **settings)
        endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT") or ""
        if endpoint.startswith("http://") or os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true"):
            options["allow_http"] = True
        if place.account:
            settings["account_name"] = place.account.partition(".")[0]
        return AzureStore(place.bucket, **settings)
    except OSError as e:
        raise UserError(f"AWS_CA_BUNDLE: {os.environ['AWS_CA_BUNDLE']} cannot be read: {e.strerror}") from e
    except (BaseError, ValueError) as e:
        if "Account must be specified" in str(e):
            raise UserError(f"{place.url}: {_CREDENTIALS['az']}") from e
        raise UserError(f"{place.url}: cannot be opened: {_first_line(e)}") from e


def _retries(patience: float) -> dict[str, Any]:
    """Backoff from 0.1 s, doubled up to 15 s, with jitter. Stores answer 503 and 429 to who asks too fast."""
    return {
        "max_retries": 30,
        "retry_timeout": timedelta(seconds=patience),
        "backoff": {
            "init_backoff": timedelta(seconds=0.1),
            "max_backoff": timedelta(seconds=min(15.0, max(0.2, patience / 4))),
            "base": 2,
        },
    }


# ------------------------------------------------------------------------------------------------------------- AWS's


def _s3_config() -> tuple[Any, Any]:
    """(settings, credential provider) of S3: the environment, then the profile of ~/.aws, then the machine's role."""
    env = os.environ.get
    profile = _profile(env("AWS_PROFILE") or env("AWS_DEFAULT_PROFILE"))
    config: dict[str, str] = {}
    endpoint = env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or env("AWS_ENDPOINT")
    endpoint = endpoint or profile.get("s3.endpoint_url") or profile.get("endpoint_url")
    if endpoint:
        if not re.match(r"https?://[^/\s]+", endpoint):
            raise UserError(f"AWS_ENDPOINT_URL: {endpoint!r} is no address: give http://host:port or https://host")
        config["endpoint"] = endpoint.rstrip("/")
    if region := env("AWS_REGION") or env("AWS_DEFAULT_REGION") or profile.get("region"):
        config["region"] = region
    provider = None
    if not env("AWS_ACCESS_KEY_ID"):
        if "aws_access_key_id" in profile and "role_arn" not in profile:
            config["access_key_id"] = profile["aws_access_key_id"]
            config["secret_access_key"] = profile.get("aws_secret_access_key", "")
            if token := profile.get("aws_session_token"):
                config["session_token"] = token
        elif any(key.startswith(("sso_", "role_arn", "credential_process", "login_")) for key in profile):
            provider = _boto3_provider(profile["name"])
    elif not env("AWS_SECRET_ACCESS_KEY"):
        raise UserError("AWS_ACCESS_KEY_ID is set, and AWS_SECRET_ACCESS_KEY is not: set both")
    return config, provider


def _profile(name: str | None) -> dict[str, str]:
    """What ~/.aws says of a profile, with its `name`; of the default one nothing has to be there."""
    folder = Path("~/.aws").expanduser()
    files = [
        Path(os.environ.get("AWS_CONFIG_FILE") or folder / "config").expanduser(),
        Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or folder / "credentials").expanduser(),
    ]
    found: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser(default_section="", strict=False)
        try:
            parser.read_string(file.read_text())
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, configparser.Error) as e:
            raise UserError(f"{file}: cannot be read as AWS's configuration: {type(e).__name__}") from e
        for section in (name or "default", f"profile {name or 'default'}"):
            if parser.has_section(section):
                found |= {"name": name or "default", **{k: v.strip() for k, v in parser.items(section)}}
        services = f"services {found.get('services', '')}"
        if parser.has_section(services) and (nested := parser.get(services, "s3", fallback="")):
            found |= {f"s3.{k.strip()}": v.strip() for k, _, v in (s.partition("=") for s in nested.splitlines()) if v}
    if name and not found:
        raise UserError(f"AWS_PROFILE: {' and '.join(map(str, files))} know no profile {name!r}")
    return found


def _boto3_provider(profile: str) -> Any:
    """Credentials that boto3 gets: single sign-on, assumed roles, processes."""
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as e:
        raise UserError(
            f"AWS profile {profile!r} signs in by single sign-on, a role or a process, which needs boto3: `pip install "
            f"boto3`, or set the keys: `eval $(aws configure export-credentials --profile {profile} --format env)`"
        ) from e
    return Boto3CredentialProvider(boto3.session.Session(profile_name=profile))


# ------------------------------------------------------------------------------------------------------------ errors


def explain(error: BaseException, place: StoreURL, doing: str) -> Exception:
    """What to raise in place of a client's error: UserError where somebody must do something, else StoreUnavailable.

    `doing`: "reading a.tar", say.
    """
    text, url, kind = str(error), place.url, place.kind
    code = next(iter(re.findall(r"<Code>(\w+)</Code>", text)), "")
    status = next(iter(re.findall(r"status code: (\d{3})", text)), "")
    names = {c.__name__ for c in type(error).__mro__}
    said = _first_line(error) + (f": {code}" if code else "")
    if any(host in text for host in _METADATA):
        return UserError(f"{url}: no credentials for it are here: {_CREDENTIALS[kind]}. ({said})")
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return UserError(f"{url}: there is no bucket {place.bucket!r}. Create it, or give another. ({said})")
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed") or status == "301":
        return UserError(f"{url}: the bucket is in another region: set AWS_REGION to the one it is in. ({said})")
    if code in ("AccessDenied", "AuthorizationPermissionMismatch", "AllAccessDisabled"):
        return UserError(f"{url}: {doing} is not allowed with these credentials. {_rights(kind)} ({said})")
    if code in ("RequestTimeTooSkewed",):
        return UserError(f"{url}: the clock of this machine is wrong, so the store refuses its requests. ({said})")
    refused = status in ("401", "403") or code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
    if refused or names & {"PermissionDeniedError", "UnauthenticatedError"}:
        return UserError(f"{url}: these credentials are refused ({code or status}): {_CREDENTIALS[kind]}. ({said})")
    if "NotSupportedError" in names or status == "501" or "NotImplementedError" in names:
        return UserError(f"{url}: the store cannot do what {doing} needs. ({said})")
    if "builder error" in text and "http://" in text:
        return UserError(f"{url}: its address is http://, not https://: set AWS_ALLOW_HTTP=true. ({said})")
    if "kind: Connect" in text:
        return StoreUnavailable(
            f"{url}: cannot be reached while {doing}: no such host, nothing listens there, or not by http(s). Look at "
            f"the address ({_endpoint(kind)}) and the network. {_AGAIN} ({said})"
        )
    return StoreUnavailable(f"{url}: the store failed while {doing}, also after trying for a while. {_AGAIN} ({said})")


_AGAIN = "What is done stays done; the same command goes on where it stopped."


def _rights(kind: str) -> str:
    if kind == "s3":
        return "They need s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload."
    return "They need to list, read, write and delete objects."


def _endpoint(kind: str) -> str:
    if kind != "s3":
        return {"gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}[kind]
    return "AWS_ENDPOINT_URL" + (f"={url}" if (url := os.environ.get("AWS_ENDPOINT_URL")) else ", AWS_REGION")


def _first_line(error: BaseException) -> str:
    """What an error says in its first line, without what signs a request, and without the XML of an answer."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    line = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", line)
    return re.sub(r":?\s*<\?xml.*", "", line)[:400]
