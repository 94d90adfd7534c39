"""Many clips: a table of requests to a folder of videos, in this process or on a Ray cluster."""
