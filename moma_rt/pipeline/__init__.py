"""From a request to its pictures: checks, batching, enrollment, conditioning and the sampling loop."""
