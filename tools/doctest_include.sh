#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prints the folder that holds doctest/doctest.h, the header of the C++ suite's test framework.
#
#   tools/doctest_include.sh TARGET
#
# The one in $DOCTEST_INCLUDE_DIR if that is set; else the system's, if there is one; else Debian's package doctest-dev, unpacked (not installed, so
# no root is needed) into TARGET; else a message that says what to install, and status 1.
set -eu

if [ $# -ne 1 ]; then
  echo "usage: $0 TARGET" >&2
  exit 2
fi
target=$1

if [ -n "${DOCTEST_INCLUDE_DIR:-}" ]; then
  if [ ! -f "$DOCTEST_INCLUDE_DIR/doctest/doctest.h" ]; then
    echo "DOCTEST_INCLUDE_DIR is '$DOCTEST_INCLUDE_DIR', which holds no doctest/doctest.h" >&2
    exit 1
  fi
  echo "$DOCTEST_INCLUDE_DIR"
  exit 0
fi
for include in "$target/usr/include" /usr/include /usr/local/include /opt/homebrew/include; do
  if [ -f "$include/doctest/doctest.h" ]; then
    echo "$include"
    exit 0
  fi
done

if command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
  mkdir -p "$target"
  # apt-get download writes to the working directory. Without a package index, as in a fresh
  # container, it finds nothing: then fetch one, which only root can.
  if (cd "$target" && { apt-get download doctest-dev ||
                        { apt-get update && apt-get download doctest-dev; }; }) \
       >"$target/apt.log" 2>&1; then
    for package in "$target"/doctest-dev_*.deb; do
      dpkg -x "$package" "$target"
    done
    if [ -f "$target/usr/include/doctest/doctest.h" ]; then
      echo "$target/usr/include"
      exit 0
    fi
  fi
fi

cat >&2 <<MESSAGE
doctest/doctest.h was not found and could not be fetched. Install it
  Debian, Ubuntu:  apt-get install doctest-dev
  Fedora:          dnf install doctest-devel
  macOS:           brew install doctest
or name the folder that holds doctest/doctest.h: DOCTEST_INCLUDE_DIR=<folder>.
MESSAGE
if [ -f "$target/apt.log" ]; then
  echo "What apt-get said is in $target/apt.log." >&2
fi
exit 1
