"""Tests in three rooms (unit, kernel, vm), and the lab in which real guests run."""
