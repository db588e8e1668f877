"""Side-by-side timings; `make bench` prints them."""
