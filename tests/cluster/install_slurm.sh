#!/usr/bin/env bash
# Install a real Slurm (controller, node daemon, commands, munge) and its accounting database on Debian or Ubuntu,
# without starting or configuring any of it: tests/cluster/harness.py runs its own daemons from its own folder.
# With it come a browser and PostgreSQL, for the tests of reports and of MLflow. About 1 GB. Run as root; a second run finds everything there and changes nothing.
#
#   sudo tests/cluster/install_slurm.sh
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C DEBIAN_FRONTEND=noninteractive

declare -A package_of=(
    [slurmctld]=slurmctld [slurmd]=slurmd [slurmdbd]=slurmdbd [sbatch]=slurm-client [munged]=munge
    [mariadbd]=mariadb-server [chromium]=chromium [pg_ctlcluster]=postgresql [unshare]=util-linux [ip]=iproute2
)
missing=()
for program in "${!package_of[@]}"; do
    command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "install_slurm: everything is here already ($(slurmctld -V))"
    exit 0
fi
command -v apt-get >/dev/null || {
    echo "install_slurm: this is not Debian or Ubuntu (no apt-get); install ${missing[*]} by its own means" >&2
    exit 2
}
[ "$(id -u)" -eq 0 ] || { echo "install_slurm: apt-get needs root; run it with sudo" >&2; exit 2; }

# Debian starts a daemon as soon as its package is unpacked unless policy-rc.d answers 101.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
echo "install_slurm: installing ${missing[*]} (no daemon is started)"
apt-get update -qq
apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "install_slurm: done ($(slurmctld -V))"
