"""What compilers make of our kernels, and the document that says so."""
