"""What more than one stage stands on: cameras, head model, rendering, networks, run bookkeeping."""
