#!/bin/sh
# Put network namespaces into the mesh, look at them, and take them out again.
#
#     sudo pyambient up --mesh examples/mesh.yaml        # in another terminal
#     sudo examples/enrol_by_cli.sh NETNS...             # names from `ip netns`
#
# Each gets the identity spiffe://cluster.local/ns/default/sa/NETNS.
set -eu

if [ $# -eq 0 ]; then
    echo "usage: $0 NETNS..." >&2
    exit 2
fi

# Whatever happens below, the namespaces are direct again at the end.
trap 'for netns; do pyambient unenroll "$netns" || :; done' EXIT

for netns; do
    echo "# what enrolling $netns would change"
    pyambient enroll "$netns" --namespace default --service-account "$netns" --dry-run
    pyambient enroll "$netns" --namespace default --service-account "$netns"
    pyambient verify "$netns"
done

pyambient status
echo "press Enter to un-enrol"
read -r _ || :
