"""The public API: takes requests, routes them to workers, owns each request's life. Never imports torch."""
