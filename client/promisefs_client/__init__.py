"""The promisefs client: mounts a volume and caches it as long as its promises hold."""
