"""Measures of a landscape: functions `f(landscape, ...) -> frozen result`."""
