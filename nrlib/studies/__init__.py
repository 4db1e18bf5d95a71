"""Studies of extended models themselves: what their gates learn, and what becomes of several new languages in one model. Each is
a function that `nrlib.study.run_study` calls and whose results it keeps. Nothing in the core imports them."""
