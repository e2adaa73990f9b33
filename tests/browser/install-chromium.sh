#!/bin/sh
# The browser tests open reports in headless Chromium. Install Debian's packages where they are missing and we may.
set -eu
if command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1; then
  exit 0
fi
if [ "${TORCHSTONE_NO_BROWSER:-}" = 1 ]; then
  exit 0
fi
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium chromium-driver fonts-dejavu-core
  exit 0
fi
echo "The browser tests need Chromium and ChromeDriver, which are not installed:" >&2
echo "  sudo apt-get install chromium chromium-driver     (Debian, Ubuntu)" >&2
echo "or run the suite without them: TORCHSTONE_NO_BROWSER=1 make test" >&2
exit 1
