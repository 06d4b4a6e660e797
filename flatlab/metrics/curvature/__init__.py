"""Curvature: Hessian, GGN and Fisher products; eigenvalues, trace, density."""
