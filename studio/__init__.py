"""One web application: the page to draw on with a model, and the JSON API behind it; people are served in turn.

>>> service = GenerationService(Sampler("model"), Path("samples"))
>>> app = new_app(service)                                                           # an ASGI app
>>> StudioServer(app, service.queue.stop).run(sockets=[listen("127.0.0.1", 7860)])   # until Ctrl-C

From outside: `app.new_app`, `server` (listen, StudioServer), `service.GenerationService`. A further page adds its
routes to `app.ROUTERS` and its files to `app.PAGES`; gate, queue and style.css are the same for all.
"""
