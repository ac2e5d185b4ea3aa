"""One web application: explore a data folder, rate its images, draw with a model; a page for each, a JSON API behind.

>>> app = new_app(data=StudioData(data), draw=GenerationService(Sampler("model"), Path("samples")))   # an ASGI app
>>> StudioServer(app, stop).run(sockets=[listen("127.0.0.1", 7860)])   # until Ctrl-C

From outside: `app.new_app`, `server` (listen, StudioServer), `data.StudioData`, `draw.service.GenerationService`. Each
folder has its routes in `api`; gate, queue, errors, clients and page/style.css are the same for all.
"""
