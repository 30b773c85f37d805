#!/bin/sh
# A Sentinel of three; two must agree. Its file is written anew at each start: it learns the rest from the others.
set -eu
primary=
for peer in 0 1 2; do
  found=$(valkey-cli -h "tdm-valkey-$peer.tdm-valkey" -p 26379 -t 2 sentinel get-master-addr-by-name tdm 2>/dev/null | head -n 1 || true)
  [ -n "$found" ] && primary=$found && break
done
cat >/sentinel/sentinel.conf <<CONFIG
port 26379
dir /sentinel
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $HOSTNAME.tdm-valkey
sentinel monitor tdm ${primary:-tdm-valkey-0.tdm-valkey} 6379 2
sentinel down-after-milliseconds tdm 5000
sentinel failover-timeout tdm 30000
CONFIG
exec valkey-sentinel /sentinel/sentinel.conf
