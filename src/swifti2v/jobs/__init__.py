"""One clip, from a request to a file; knows no command line, no HTTP and no Ray."""
