/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What hooks on an app's calls have in common; it comes behind the constants of a program. */
#ifndef PYAMBIENT_HOOKS_H
#define PYAMBIENT_HOOKS_H

#define ENETUNREACH	101
#define ECONNREFUSED	111

/* The app learns at once that nobody will answer, as from a closed port. */
static __always_inline int refuse(int error)
{
	if (constant(has_set_retval))
		bpf_set_retval(-error);
	return DENY;
}

#endif
