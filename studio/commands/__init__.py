"""Run the command line from the page: what a page does to a data folder is a command that can be typed as well.

From outside: `api` (the routes), `service.CommandService`, `actions` (what can be asked for).
"""
