"""A page to draw on, and the JSON API behind it: one model, one thread that draws, people served in turn.

>>> service = GenerationService(Sampler("model"), Path("samples"))
>>> app = new_app(service)                                                  # an ASGI app
>>> StudioServer(app, service).run(sockets=[listen("127.0.0.1", 7860)])     # until Ctrl-C

app: routes, errors, the server;  gate: what is refused first;  attempts: tokens that are wrong;  wire: schemas of the
JSON;  body: requests, read within bounds;  service: jobs and images;  queue: whose job is next;  page/: what the
browser gets.
"""
