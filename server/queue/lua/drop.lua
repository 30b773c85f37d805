#!lua flags=allow-oom
-- drop: forget a dead letter. The job stays failed. -> 1, or 0 if it was gone
return redis.call("XDEL", dead, ARGV[1])
