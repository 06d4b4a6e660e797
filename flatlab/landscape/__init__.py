"""The loss as a function of the parameters, and the checks that it is one."""
