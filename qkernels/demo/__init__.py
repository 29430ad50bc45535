"""`qkernels demo`: a real language model under several schemes, what each loses and saves, and an answer from one."""
