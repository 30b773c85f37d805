"""QueueError: what queue verbs raise when Redis cannot be reached; other packages do not import redis."""

from redis.exceptions import RedisError as QueueError

__all__ = ["QueueError"]
