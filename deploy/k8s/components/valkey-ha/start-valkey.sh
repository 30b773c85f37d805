#!/bin/sh
# A Valkey of three. It follows whom a Sentinel names; before there is one, pod 0 is the primary.
set -eu
me="$HOSTNAME.tdm-valkey"
primary=
for peer in 0 1 2; do
  found=$(valkey-cli -h "tdm-valkey-$peer.tdm-valkey" -p 26379 -t 2 sentinel get-master-addr-by-name tdm 2>/dev/null | head -n 1 || true)
  [ -n "$found" ] && primary=$found && break
done
[ -n "$primary" ] || primary=tdm-valkey-0.tdm-valkey
set -- --protected-mode no --dir /data --appendonly yes --appendfsync always --maxmemory 1gb --maxmemory-policy noeviction \
  --replica-announce-ip "$me" --min-replicas-to-write 1 --min-replicas-max-lag 10
[ "$primary" = "$me" ] || set -- "$@" --replicaof "$primary" 6379
exec valkey-server "$@"
