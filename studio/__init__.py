"""A page to draw on, and the JSON API behind it: one model, one thread that draws, people served in turn.

>>> studio = Studio(Artist("model"), Path("samples"))
>>> app = new_app(studio)                                               # an ASGI app
>>> Server(app, studio).run(sockets=[listen("127.0.0.1", 7860)])        # until Ctrl-C

app: routes, errors, the server;  gate: what is refused first;  guesses: tokens that are wrong;  wire: what is said in
JSON;  body: requests, read within bounds;  studio: jobs and pictures;  turns: whose job is next;  page/: what the
browser gets.
"""
