"""Keys: names in Redis; the scripts derive theirs from a class's prefix (`lua/_names.lua`)."""

SCHEMA = 2
"""Of all keys, and of the fields of what they hold. Another schema is another set of keys: what a
process would misunderstand it does not find."""
ROOT = f"q:{SCHEMA}"
FIRST_MODELS_KEY = "q:models"
"""`MODELS_KEY` of the first schema, whose keys bore no number."""
MODELS_KEY = f"{ROOT}:models"
"""Every class that was ever seen, with its bundle's manifest."""
GROUP = "w"
"""The consumer group of a lane."""


def turn_key(task: str) -> str:
    """Held by the api process that does what one of them is to do."""
    return f"{ROOT}:{task}"


def class_prefix(model: str) -> str:
    """Prefix of every key of a class; the braces keep them in one cluster slot."""
    return f"{ROOT}:{{{model}}}"


def job_key(model: str, job_id: str) -> str:
    """The record of one job."""
    return f"{class_prefix(model)}:j:{job_id}"


def waiting_key(model: str, priority: str) -> str:
    """Queued ids of one priority by time of arrival."""
    return f"{class_prefix(model)}:n:{priority}"


def stream_of(model: str, version: str) -> str:
    """The lane of one version: the stream that is its dispatch window."""
    return f"{class_prefix(model)}:s:{version}"


def replies_key(model: str, address: str) -> str:
    """The stream in which one api process is told of a class's jobs that have ended."""
    return f"{class_prefix(model)}:r:{address}"
