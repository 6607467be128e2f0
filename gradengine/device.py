from gradengine.devices import *
