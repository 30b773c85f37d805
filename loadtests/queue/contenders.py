"""The queues compared, by name. A peer's library is imported only where that peer runs."""

from importlib import import_module

from loadtests.queue.contender import Contender

OURS = "tdm-server"
_CLASSES = {
    OURS: ("loadtests.queue.ours", "OurQueue"),
    "saq": ("loadtests.queue.peer_saq", "Saq"),
    "taskiq-redis": ("loadtests.queue.peer_taskiq", "Taskiq"),
    "dramatiq": ("loadtests.queue.peer_dramatiq", "Dramatiq"),
}
NAMES = tuple(_CLASSES)


def contender(name: str) -> Contender:
    """The queue of that name, of NAMES.

    Raises:
        ImportError: its library is not installed.
    """
    module, class_name = _CLASSES[name]
    made: Contender = getattr(import_module(module), class_name)()
    return made
