#!/usr/bin/env bash
# Submit, poll, download and cancel with nothing but curl.
#
#   make serve                                        # in another terminal
#   bash examples/client.sh http://127.0.0.1:8000     # writes picture.png
set -euo pipefail
server=${1:-http://127.0.0.1:8000}
ask=(curl --fail-with-body --silent --show-error)

# submit BODY: the URL of the new job. A retry with the same key gets the same job, not a second one.
submit() {
  "${ask[@]}" --retry 3 --retry-connrefused --dump-header - --output /dev/null \
    --header 'Content-Type: application/json' --header "Idempotency-Key: $(date +%s%N)-$RANDOM" \
    --data "$1" "$server/v1/images" | tr -d '\r' | sed -n 's/^location: //Ip'
}

# status JOB: queued, in_progress, completed, failed or expired
status() {
  "${ask[@]}" "$1" | grep -oE '"status":"[a-z_]+"' | cut -d'"' -f4
}

# wait_s 0: answer at once, do not wait for the picture
job=$(submit '{"prompt": "a large red sphere on the left, on grass at sunset", "seed": 7, "wait_s": 0}')
while [[ $(status "$job") == queued || $(status "$job") == in_progress ]]; do
  sleep 0.1
done
echo "$job: $(status "$job")"
"${ask[@]}" --output picture.png "$job/content"

# ten pictures, and a change of mind: a finished job stays as it is, any other one fails with the code `cancelled`
job=$(submit '{"prompt": "a small blue cube", "n": 10, "wait_s": 0}')
"${ask[@]}" --request DELETE --output /dev/null "$job"
while [[ $(status "$job") == in_progress ]]; do
  sleep 0.1
done
echo "$job: $(status "$job")"
