"""The stages of SwiftI2V and the pipeline that joins them; no files, no command line."""
