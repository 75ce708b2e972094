"""What is measured on a teacher: scores, sensitivities, calibration, and their figures."""
