"""What `scripts/bench` measures: `targets` are the places, `files` and `visible` the measurements."""
