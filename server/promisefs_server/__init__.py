"""The promisefs file server: store, promises, breaks."""
