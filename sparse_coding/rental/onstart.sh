#!/bin/bash
# This machine destroys itself: at its deadline, after its lifetime, or once its results are fetched.
cd ~ || exit
umask 077
mkdir -p .sae
printf 'Authorization: Bearer %s' "$CONTAINER_API_KEY" > .sae/header
url=${VAST_URL:-https://console.vast.ai}/api/v0/instances/$CONTAINER_ID/
destroy() {
  curl -sf -m 60 -X DELETE -H @.sae/header -H 'Content-Type: application/json' -d '{}' "$url" && return
  for python in python3 /venv/main/bin/python /opt/conda/bin/python; do
    "$python" - "$url" << 'END' && return
import sys, urllib.request
name, value = open(".sae/header").read().split(": ", 1)
headers = {name: value, "Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1], b"{}", headers, method="DELETE")
urllib.request.urlopen(request, timeout=60)
END
  done
  return 1
}
# the clock may be wrong and the machine may restart: seconds lived are counted as well
over() {
  lived=$(($(cat .sae/lived 2> /dev/null || echo 0) + @EVERY@))
  echo "$lived" > .sae/lived
  [ -e .sae/done ] || [ "$(date +%s)" -ge @DEADLINE@ ] || [ "$lived" -ge @LIFETIME@ ]
}
(
  trap '' HUP
  until over; do sleep @EVERY@; done
  until destroy; do sleep @EVERY@; done
) > .sae/watchdog.log 2>&1 < /dev/null &
