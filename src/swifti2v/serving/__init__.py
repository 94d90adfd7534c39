"""Videos over HTTP: a server that answers, a worker that computes, jobs in SQLite between them."""
