"""Tests that need a CUDA device. Modules run by name: those that start jobs first, before this process uses the GPU."""
