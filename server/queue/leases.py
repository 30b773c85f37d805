"""WorkerQueue: the worker's side of the queue (lease, start, extend, finish, hand back)."""
