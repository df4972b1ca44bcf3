"""What goes: selections, masks, and the surgery that turns a masked network into a smaller ordinary one."""
