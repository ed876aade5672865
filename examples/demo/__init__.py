"""The main job of pyambient on real traffic, told and checked step by step.

Run it with `make demo`, or as root with `python -m examples.demo`. Read it in this order: `story`
(what happens), `bed` (the namespaces it happens in), `mesh` (pyambient as its users see it),
`wire` (what a capture proves), `residue` (what an enrolment could leave behind).
"""
