"""What promisefs clients and servers say to each other: identifiers, messages, frames, abort codes."""
