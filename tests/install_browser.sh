#!/bin/sh
# The browser of the slow tests. Debian and Ubuntu; needs root.
set -eu
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core
chromium --version
