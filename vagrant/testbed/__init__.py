"""Guests with other kernels, built from the distribution's package sources and run under qemu.

General theory of operation
---------------------------
One Debian guest serves every kernel. `guest` builds its root file system, `kernels` the kernels
that boot it, `box` a Vagrant box of the same bytes. Each of them is a stage of `cache`: a folder
outside git that is named after a hash of all that went into it, so it is built once, and again
when an input changes. `machine` boots a kernel directly on a throw-away overlay of the image:
the job goes in as one raw tar disk, its results come back on another, its output by a serial port.

Needs Debian's python3 and nothing else: it has to work before the project's own environment does.
"""
