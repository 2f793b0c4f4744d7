"""Images and cells in containers, for `scripts/ci-container`. Only the standard library: it runs before any setup."""
