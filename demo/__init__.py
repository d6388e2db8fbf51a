"""What `make demo`, `make install` and the end-to-end tests do, step by step."""
