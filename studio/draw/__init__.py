"""Draw with a model: what people ask for becomes jobs, what is generated becomes files in a folder.

From outside: `api.api` (the routes), `service.GenerationService`.
"""
