#!/usr/bin/env bash
# Install what `make test-slurm` and `make test-hostfile` need, on Debian or Ubuntu, as root; no daemon is started.
set -euo pipefail
packages=(slurm-wlm munge openssh-server openssh-client iproute2 pdsh util-linux)

missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

# Packages start their daemons when they are installed, unless this file forbids it.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --yes --no-install-recommends "${missing[@]}"
# Nor at the next start of the machine.
for package in "${missing[@]}"; do
    case $package in
    slurm-wlm) units="slurmctld slurmd" ;;
    munge) units=munge ;;
    openssh-server) units=ssh ;;
    *) continue ;;
    esac
    systemctl --quiet disable $units 2>/dev/null || true    # there may be no systemd
done
