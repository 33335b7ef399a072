"""A model that many ask at once: slots of constant state, an HTTP interface, and memories that are kept.

api        the OpenAI-compatible HTTP server; `shapes` are its requests, `page.html` is what a person sees
answers    from a request to its answer, whole or in a stream
engine     one loop that fills a fixed number of slots; `programs` is what it compiles
prefixes   states of beginnings that were read before; `prefix_store` has them on disk or in an object store
memories   texts that were read once, by name
"""

__all__ = ["answers", "api", "engine", "memories", "prefix_store", "programs"]
