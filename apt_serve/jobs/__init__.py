"""Work that outlives its request: files, batches and jobs, and the workers that run them; knows no HTTP server."""
