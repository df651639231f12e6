"""What org.freedesktop.DBus.Introspectable tells of the agent's objects (D-Bus Specification 0.43)."""

from __future__ import annotations

_DOCTYPE = """\
<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
"""
_CHILD_OF = {"/": "org", "/org": "ballast", "/org/ballast": "Agent1"}
_AGENT = """\
<node>
  <interface name="org.ballast.Agent1">
    <property name="PressureLevel" type="s" access="read"/>
    <property name="BalloonBytes" type="t" access="read"/>
    <property name="FreezeState" type="s" access="read"/>
    <property name="Version" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
    <method name="Freeze">
      <arg name="lease_ms" type="t" direction="in"/>
      <arg name="mountpoints" type="as" direction="in"/>
      <arg name="id" type="s" direction="out"/>
    </method>
    <method name="Thaw">
      <arg name="id" type="s" direction="in"/>
      <arg name="held" type="b" direction="out"/>
    </method>
    <method name="RegisterWriter">
      <arg name="name" type="s" direction="in"/>
      <arg name="path" type="o" direction="in"/>
      <arg name="description" type="a{sv}" direction="in"/>
    </method>
    <method name="UnregisterWriter">
      <arg name="name" type="s" direction="in"/>
    </method>
  </interface>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface" type="s" direction="in"/>
      <arg name="name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"/>
      <arg name="values" type="a{sv}" direction="out"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface" type="s"/>
      <arg name="changed" type="a{sv}"/>
      <arg name="invalidated" type="as"/>
    </signal>
  </interface>
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect">
      <arg name="xml" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
  </interface>
</node>
"""


def introspect(path: str | None) -> str | None:
    """The XML for an object; None if there is none."""
    if path == "/org/ballast/Agent1":
        return _DOCTYPE + _AGENT
    child = _CHILD_OF.get(str(path))
    return f'{_DOCTYPE}<node>\n  <node name="{child}"/>\n</node>\n' if child else None
