"""`pyambient bench intercept`: what each interception costs, beside no proxy and one asked."""
